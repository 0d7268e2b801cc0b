"""One module per notebook of the chain: each turns artefacts into an artefact, so that a notebook needs a single call."""
