"""Everything that makes it a loop: injection, conditioning, halting, loop counts, the block."""
