"""The only modules that touch kernel files. Every root can be given, so that tests read captured trees."""
