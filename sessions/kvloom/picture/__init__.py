"""A conversation tree as a picture: where each turn stands, as SVG, as a page. None of it reads a store."""
