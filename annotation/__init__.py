"""Images and words in, concept labels out: the vision-language half, the alignment, and the trust in both."""
