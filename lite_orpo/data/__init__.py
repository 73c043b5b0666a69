"""From a preference file or data set to the token rows of one optimiser step."""
