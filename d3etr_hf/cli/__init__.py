"""The command `d3etr`: parsing, one file a subcommand, training runs, the demonstration."""
