"""What the command line does, one module a subject. No torch here: the engine is reached by its module's name."""
