"""All sentences, tables and pages about a result."""
