"""What may cross a border between rooms: errors, concepts, tables, the run folder and its manifest."""
