"""The topic `samples` as its readers need it: what a record says, in what order, and what is still kept."""
