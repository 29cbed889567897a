"""Methods of learning without labels, against one another in accuracy at equal time."""
