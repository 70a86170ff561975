"""The ways to distribute training, each under its name on the command line."""
