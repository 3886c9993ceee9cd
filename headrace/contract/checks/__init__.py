"""What can be wrong in a project, each with its place: types, names, and declarations that contradict each other."""
