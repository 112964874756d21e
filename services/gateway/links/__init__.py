"""The links to the engines: which there are, one link each, what is heard on it, when it is given up."""
