"""What the files that generate hardware are made of; Amaranth is imported when something is built, never before."""
