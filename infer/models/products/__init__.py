"""How a CPU multiplies tokens by weights: in the layers' own way, packed, turned round or in int8."""
