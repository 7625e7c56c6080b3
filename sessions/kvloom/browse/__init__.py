"""Walking about a conversation tree in a terminal, and talking in it. Only ``kvloom browse`` imports it."""
