"""The durable store: trie, sessions, state. It never imports torch: bytes, dtype names, shapes and token ids only."""
