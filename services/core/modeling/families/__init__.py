"""The networks, a family a file, and the table of them."""
