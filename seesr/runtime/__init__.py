"""What every stage needs: memory budget, precision and its retry, progress, tile geometry."""
