"""Answers: the engine process, which holds the weights, and the client of its socket, which never imports torch."""
