"""Measuring operators: clocks (`measure`), operators at the sizes of real models beside their peers, and what
`shardwise bench ops` runs of them (`categories`)."""
