"""Verbs about the models: which is served, export, going back to an earlier one."""
