"""Floor 2: the only floor with sockets. It moves tensors between ranks and notices who is gone."""
