"""A complete experiment in minutes on a CPU: two small models, trained from scratch with and without a change, compared."""
