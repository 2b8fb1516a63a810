"""How decoding designs are tried out: the family's side of a study, one module per question."""
