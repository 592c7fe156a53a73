"""What users do with sharded parameters beside training: build a model sharded, make parameters whole for a while.

`init` shards what is built in its context, or a module that exists; `building` notices what is built; `gathered` makes
parameters whole. Scripts find them as `deepspeedlite.zero.Init` and `GatheredParameters`. They stand on the flat values
of `zero` as an engine does: no training needs them, and nothing of the core knows them.
"""
