"""pair → mine → weigh → emit: the path that every objective takes."""
