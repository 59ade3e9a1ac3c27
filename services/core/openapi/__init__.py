"""What a capability describes its endpoints with; the gateway binds the chapters to one document."""
