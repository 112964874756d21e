"""The engine on the wire: protobuf in, commands to the loop; events of the loop out. Knows no tensors."""
