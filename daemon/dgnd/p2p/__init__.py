"""The libp2p host: who may connect, and frames between peers. The only place that imports libp2p."""
