"""Inputs to run the sources on, networks run call by call, and running statistics of what they give."""
