"""Where the programs' data come from: downloads, preparation, caches."""
