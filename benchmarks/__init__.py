"""What a rule costs: the compiled program, tracing and eager calls, each against the same rule written by hand."""
