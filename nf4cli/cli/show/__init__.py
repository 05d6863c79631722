"""What a person sees: consoles, progress, tables and JSON documents."""
