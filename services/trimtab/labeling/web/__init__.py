"""The web side of labeling: pages for people, a REST API for programs, both over the same functions."""
