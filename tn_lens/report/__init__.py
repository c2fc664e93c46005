"""The report page of a run, and the templates of all pages and sentences."""
