"""Open an output in its own library: transformers, diffusers or sentence-transformers.

transformers holds linear layers in 4 bit, and no stack of experts.  `opening` chooses the class and
says what cannot be held; `packed_stacks` gives transformers a quantizer that can hold stacks.
"""
