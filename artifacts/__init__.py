"""The artifact: what the compiler leaves and the runtime maps. Its format, its store, its target."""
