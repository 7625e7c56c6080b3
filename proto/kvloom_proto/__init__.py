"""The wire format of captured state: schema, generated code, records and limits. See FORMAT.md."""
