"""Numbered steps from each schema to the next. They are never edited once released; a new need is a new step."""
