"""What callers send beside text, and what they name by URL: fetched under guard, decoded in bounds."""
