"""What a person touches: the browser pages, the HTTP API and the command line."""
