"""Streams that nobody here wrote: data sets inside packages, learned in one pass beside other libraries' learners."""
