"""Floor 5: the ways to distribute training, one short file each; a file's name is its name on the
command line."""
