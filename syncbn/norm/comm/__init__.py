"""What crosses between ranks: the exchange, its transports, process groups and the watchdog."""
