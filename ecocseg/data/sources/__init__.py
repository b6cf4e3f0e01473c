"""Raw data sets: each file turns one published layout into records."""
