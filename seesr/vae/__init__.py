"""The VAE at any image size: in one pass, in strips of rows, or in tiles that share what a layer needs of all."""
