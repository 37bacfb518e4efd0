"""What the project is measured with. Evidence goes to `results`, by `lab.report`; nothing there is typed by hand."""
