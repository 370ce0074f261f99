"""Options, teacher, objective and trainer."""
