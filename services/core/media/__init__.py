"""What callers name by URL: fetched under guard, decoded in bounds."""
