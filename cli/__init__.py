"""The command line: it parses, calls the core, and is the only part that prints."""
