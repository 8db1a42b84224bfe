/* The public services as a serialized FileDescriptorSet, embedded at build time for gRPC reflection. */
#ifndef TM_PROTO_DESCRIPTOR_SET_H
#define TM_PROTO_DESCRIPTOR_SET_H

extern const unsigned char tm_descriptor_set[];
extern const unsigned long tm_descriptor_set_len;

#endif
