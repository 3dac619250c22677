"""Where experiments keep their records: one schema for SQLite and PostgreSQL, one writer, no text of users."""
